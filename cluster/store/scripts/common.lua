-- What every script of a tenant's books begins with.
-- KEYS[1]: the tenant's prefix. ARGV[1]: the time to live of an unused value in ms.
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
