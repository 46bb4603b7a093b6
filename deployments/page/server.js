// Calls to the server: the key, errors as sentences, streams of events.

const KEY = "briolette.key";

export class ServerError extends Error {
  constructor(status, sentence, retryAfter = null) {
    super(sentence);
    this.status = status; // of HTTP; 0: nobody answered
    this.retryAfter = retryAfter; // seconds, where the server knows
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY),
  set: (value, remember) => (remember ? localStorage : sessionStorage).setItem(KEY, value),
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

// The JSON of an answer. Throws ServerError.
export async function ask(path, { method = "GET", signal = AbortSignal.timeout(90_000) } = {}) {
  const response = await send(path, { method, signal });
  return response.json();
}

// The JSON of each event of a stream, until its end. Throws ServerError, also for an error that
// comes in the middle.
export async function* stream(path, body, signal) {
  const response = await send(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.status ?? 500, event.error.message);
    yield event;
  }
  throw new ServerError(0, "The answer broke off: the gateway went away.");
}

async function send(path, { headers = {}, ...options }) {
  const shown = key.get();
  if (shown) headers.Authorization = `Bearer ${shown}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The gateway doesn't answer. Is the cluster up?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let sentence = `The gateway answered ${response.status} ${response.statusText}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // not in our form: a proxy's, perhaps
  }
  return new ServerError(response.status, sentence, retryAfter);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await broken(reader.read());
    if (done) return;
    const parts = (text + value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function broken(reading) {
  try {
    return await reading;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The answer broke off: the gateway went away.");
  }
}
