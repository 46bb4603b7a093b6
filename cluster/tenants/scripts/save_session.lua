-- Save a session in place of one version of it, or as a new one.
-- KEYS[2], where given: the hash in which the tenant must have a record.
-- ARGV[2..8]: name, content, meta, the budget in bytes, the version to replace ('' for none), the
-- tenant, how many keys it needs; then these keys, then its traces.
-- Keys that only the replaced version needed become ordinary values, and traces.
-- Returns {1, the new version, missing keys} or, with nothing changed, {0, bytes that all sessions
-- would need}, {-1} if another version is there, or {-2} if the tenant has no record.
local name, content, meta, budget = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if KEYS[2] and redis.call('HEXISTS', KEYS[2], ARGV[7]) == 0 then return {-2} end
local record = record_of(name)
local before = redis.call('HMGET', record, 'version', 'created')
if (before[1] or '') ~= ARGV[6] then return {-1} end
local old_keys, growth = all_keys(name), #content - redis.call('HSTRLEN', record, 'content')
local is_old, is_needed, last = {}, {}, 8 + tonumber(ARGV[8])
for _, key in ipairs(old_keys) do is_old[key] = true end
for i = 9, last do is_needed[ARGV[i]] = true end
local function each_new(call)
  for i = 9, last do if not is_old[ARGV[i]] then call(ARGV[i]) end end
end
local function each_left(call)
  for _, key in ipairs(old_keys) do if not is_needed[key] then call(key) end end
end
each_new(pin)
each_left(unpin)
local needed = used('pinned') + growth
if needed > budget then
  each_left(pin)
  each_new(unpin)
  keep_books()
  return {0, needed}
end
charge_content(growth)
local version = clock[1]..'.'..clock[2]
redis.call('HSET', record, 'content', content, 'meta', meta, 'version', version,
  'created', before[2] or now, 'used', now)
redis.call('SADD', sessions, name)
local function trace(key) redis.call('SADD', traces_of(name), key) end
each_left(trace)
for i = last + 1, #ARGV do trace(ARGV[i]) end
redis.call('DEL', keys_of(name))
local missing = {}
for i = 9, last do
  redis.call('RPUSH', keys_of(name), ARGV[i])
  if redis.call('EXISTS', base..'kv:'..ARGV[i]) == 0 then missing[#missing + 1] = ARGV[i] end
end
keep_books()
return {1, version, missing}
