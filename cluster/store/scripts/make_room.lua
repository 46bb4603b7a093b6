-- Evict the tenant's least recently used values. ARGV[2]: the bytes to free; at least a twentieth
-- of all is freed, so that not every write has to ask. Returns the bytes freed.
local before = used('bytes')
local wanted = math.max(tonumber(ARGV[2]), before / 20)
remove_expired()
while before - used('bytes') < wanted do
  local oldest = redis.call('ZRANGE', lru, 0, 0)[1]
  if not oldest then break end
  remove(oldest)
end
return before - used('bytes')
