// Calls to the server: the key, errors as sentences, streams of events.

const KEY = "briolette.key";

export class ServerError extends Error {
  constructor(status, sentence, retryAfter) {
    super(sentence);
    this.status = status; // of HTTP; 0: nobody answered
    this.retryAfter = retryAfter; // seconds, where the server knows
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY),
  // Where none is asked for, nobody else is kept out either.
  isRemembered: () => sessionStorage.getItem(KEY) === null,
  set(value, remember) {
    key.forget();
    (remember ? localStorage : sessionStorage).setItem(KEY, value);
  },
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

// The JSON of an answer. Throws ServerError.
export async function ask(path, options) {
  const response = await send(path, { signal: AbortSignal.timeout(90_000), ...options });
  return response.json();
}

// The JSON of each event of a stream. Throws ServerError, also for what ends it too early.
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await send(path, { method: "POST", body: JSON.stringify(body), headers, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(500, event.error.message);
    yield event;
  }
}

async function send(path, { headers = {}, ...options }) {
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await reached(fetch(path, { ...options, headers }), "The gateway doesn’t answer. Is the cluster up?");
  if (response.ok) return response;
  const body = await response.json().catch(() => undefined); // not of ours: a proxy's, perhaps
  const sentence = body?.error?.message ?? `The gateway answered ${response.status} ${response.statusText}.`;
  throw new ServerError(response.status, sentence, response.headers.get("Retry-After"));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reached(reader.read(), "The answer broke off: the gateway went away.");
    if (done) throw new ServerError(0, "The answer broke off.");
    const parts = (text + value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const data = part.match(/^data: ?(.*)$/m);
      if (data) yield data[1];
    }
  }
}

async function reached(promise, sentence) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(0, sentence);
  }
}
