-- Book a value that was just set, and evict the tenant's least recently used ones over its budget.
-- ARGV[2..4]: the budget in bytes, the value's key, its bytes.
-- Returns {bytes in use, 1 if the value may stay}.
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
