"""How a tenant's values and sessions lie in Redis, and the scripts that keep the books.

Every key of a tenant begins with `briolette:{tenant}:`, and that is all a script is told of where
to look; only SAVE_SESSION also sees, in `briolette:tenants`, whether there is such a tenant still:

    kv:<key>              a value (cluster/store/value.py), with a time to live unless it is pinned
    lru                   sorted set of the unpinned keys, by the time of their last use in ms
    size                  hash: key -> bytes, of every value
    pins                  hash: key -> number of sessions that need it, whether or not it is there
    usage                 hash: bytes of all values and sessions, and of what is pinned of them
    sessions              set of the names of the sessions
    session:<name>        hash: content, meta, version, created and used (ms)
    session-keys:<name>   list of the keys that the session needs
    session-traces:<name> set of keys that it doesn't need, and that are to go with it

Only the scripts change the books; each runs whole or not at all, so several decoders agree. `used`
is the server's own clock. Scripts go over the wire as text: there is no state that a restart loses.
"""

from __future__ import annotations

from urllib.parse import quote

USE, LOOK = b"use", b"look"  # what LOOK_UP is for
OVERHEAD_BYTES = 512  # of Redis for one value: its key in four places, tables, rounding


def tenant_prefix(tenant: str) -> bytes:
    """Where all keys of a tenant begin. No tenant's prefix begins another's: names are quoted, and
    the braces set them apart from what is no tenant's.
    """
    return b"briolette:{%s}:" % quote(tenant, safe="").encode()


def value_name(tenant: str, key: bytes) -> bytes:
    """The Redis key of a value."""
    return tenant_prefix(tenant) + b"kv:" + key


# KEYS[1] is the tenant's prefix, ARGV[1] the time to live of an unused value in ms.
_COMMON = """
local base, ttl = KEYS[1], tonumber(ARGV[1])
local lru, size, pins, usage = base..'lru', base..'size', base..'pins', base..'usage'
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function bytes_of(key) return tonumber(redis.call('HGET', size, key) or 0) end
local function used(what) return tonumber(redis.call('HGET', usage, what) or 0) end
local function is_pinned(key) return redis.call('HEXISTS', pins, key) == 1 end
local function charge(key, bytes)
  redis.call('HINCRBY', usage, 'bytes', bytes)
  if is_pinned(key) then redis.call('HINCRBY', usage, 'pinned', bytes) end
end
-- `0 - bytes`, since -0 would reach Redis as "-0", which is no number to it. DEL comes first: on a
-- full server a script may go on only once it has written something that needs no memory.
local function remove(key)
  redis.call('DEL', base..'kv:'..key)
  charge(key, 0 - bytes_of(key))
  redis.call('HDEL', size, key)
  redis.call('ZREM', lru, key)
end
local function remove_expired()
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', lru, '-inf', now - ttl)) do remove(key) end
end
local function pin(key)
  if redis.call('HINCRBY', pins, key, 1) > 1 then return end
  redis.call('ZREM', lru, key)
  redis.call('PERSIST', base..'kv:'..key)
  redis.call('HINCRBY', usage, 'pinned', bytes_of(key))
end
local function unpin(key)
  if redis.call('HINCRBY', pins, key, -1) > 0 then return end
  redis.call('HDEL', pins, key)
  redis.call('HINCRBY', usage, 'pinned', 0 - bytes_of(key))
  if redis.call('PEXPIRE', base..'kv:'..key, ttl) == 1 then redis.call('ZADD', lru, now, key)
  else remove(key) end
end
-- The books of a tenant that has no session go when the last value is gone.
local function keep_books()
  for _, book in ipairs({lru, size, usage}) do
    if redis.call('EXISTS', base..'sessions') == 1 then redis.call('PERSIST', book)
    else redis.call('PEXPIRE', book, ttl) end
  end
  if used('bytes') == 0 then redis.call('DEL', usage) end
end
"""

# ARGV: the budget in bytes, then the key and the bytes of a value that was just set.
# Returns the bytes in use, and whether the value may stay.
BOOK_VALUE = (
    _COMMON
    + """
local budget, key, bytes = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
remove_expired()
charge(key, bytes - bytes_of(key))
redis.call('HSET', size, key, bytes)
if is_pinned(key) then redis.call('PERSIST', base..'kv:'..key)
else redis.call('ZADD', lru, now, key) end
while used('bytes') > budget do
  local oldest = redis.call('ZRANGE', lru, 0, 0)[1]
  remove(oldest or key)
  if not oldest then break end
end
keep_books()
return {used('bytes'), redis.call('EXISTS', base..'kv:'..key)}
"""
)

# ARGV: USE or LOOK, then keys. Returns the length of each value, 0 where there is none. As one
# text: to parse thousands of numbers takes redis-py longer than Redis to find them. USE counts as a
# use; on a server that refuses to write it can't be noted, which is no reason not to read.
LOOK_UP = (
    _COMMON
    + """
local lengths = {}
local is_use = ARGV[2] == 'use'
for i = 3, #ARGV do
  local key = ARGV[i]
  local name = base..'kv:'..key
  lengths[i - 2] = redis.call('STRLEN', name)
  if is_use and lengths[i - 2] > 0 and redis.call('ZSCORE', lru, key) then
    redis.pcall('ZADD', lru, now, key)
    redis.pcall('PEXPIRE', name, ttl)
  end
end
if is_use then pcall(keep_books) end
return table.concat(lengths, ' ')
"""
)

# ARGV: keys whose values are of no use. Sessions that need them go on needing them.
REMOVE_VALUES = (
    _COMMON
    + """
for i = 2, #ARGV do remove(ARGV[i]) end
keep_books()
"""
)

# ARGV: the bytes to make free. Gives up the tenant's oldest values, a twentieth of all at least, so
# that not every write has to ask; returns the bytes freed.
MAKE_ROOM = (
    _COMMON
    + """
local before = used('bytes')
local wanted = math.max(tonumber(ARGV[2]), before / 20)
remove_expired()
while before - used('bytes') < wanted do
  local oldest = redis.call('ZRANGE', lru, 0, 0)[1]
  if not oldest then break end
  remove(oldest)
end
return before - used('bytes')
"""
)

_SESSIONS = (
    _COMMON
    + """
local sessions = base..'sessions'
local function record_of(name) return base..'session:'..name end
local function keys_of(name) return base..'session-keys:'..name end
local function traces_of(name) return base..'session-traces:'..name end
local function all_keys(name) return redis.call('LRANGE', keys_of(name), 0, -1) end
local function charge_content(bytes)
  redis.call('HINCRBY', usage, 'bytes', bytes)
  redis.call('HINCRBY', usage, 'pinned', bytes)
end
"""
)

# KEYS[2], where given, is where the tenant must have a record. ARGV: name, content, meta, the
# budget in bytes, the version that it replaces ('' for none), the tenant, how many keys it needs,
# these keys, then its traces. Keys that only the replaced one needed become ordinary values, and
# traces. Returns {1, the new version, missing keys} or, with nothing changed, {0, bytes that all
# sessions would need}, {-1} where another version is there or {-2} where no record is.
SAVE_SESSION = (
    _SESSIONS
    + """
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
"""
)

# ARGV: name. Returns {content, meta, created, used before, version, keys}, or nothing.
LOAD_SESSION = (
    _SESSIONS
    + """
local fields = redis.call(
  'HMGET', record_of(ARGV[2]), 'content', 'meta', 'created', 'used', 'version')
if not fields[1] then return false end
redis.pcall('HSET', record_of(ARGV[2]), 'used', now)
fields[6] = all_keys(ARGV[2])
return fields
"""
)

# Returns the names of all sessions.
SESSION_NAMES = "return redis.call('SMEMBERS', KEYS[1]..'sessions')"

# ARGV: one name, or none for all. Returns {name, meta, created, used, bytes of its content and of
# its values that are there, number of those that are not}s.
LIST_SESSIONS = (
    _SESSIONS
    + """
local listed = {}
for _, name in ipairs(ARGV[2] and {ARGV[2]} or redis.call('SMEMBERS', sessions)) do
  local fields = redis.call('HMGET', record_of(name), 'meta', 'created', 'used')
  local bytes, missing = redis.call('HSTRLEN', record_of(name), 'content'), 0
  for _, key in ipairs(all_keys(name)) do
    bytes = bytes + bytes_of(key)
    if redis.call('EXISTS', base..'kv:'..key) == 0 then missing = missing + 1 end
  end
  if fields[1] then
    listed[#listed + 1] = {name, fields[1], fields[2], fields[3], bytes, missing}
  end
end
return listed
"""
)

# ARGV: name, then more traces. Removes it, its traces, and every value that no other session needs.
# Returns the keys removed, or nothing where there is no such session.
DELETE_SESSION = (
    _SESSIONS
    + """
local name = ARGV[2]
if redis.call('SREM', sessions, name) == 0 then return false end
remove_expired()
charge_content(0 - redis.call('HSTRLEN', record_of(name), 'content'))
local removed = {}
local function discard(key)
  if is_pinned(key) then return end
  remove(key)
  removed[#removed + 1] = key
end
for _, key in ipairs(all_keys(name)) do
  unpin(key)
  discard(key)
end
for _, key in ipairs(redis.call('SMEMBERS', traces_of(name))) do discard(key) end
for i = 3, #ARGV do discard(ARGV[i]) end
redis.call('DEL', record_of(name), keys_of(name), traces_of(name))
keep_books()
return removed
"""
)
