-- Look up values. ARGV[2]: 'touch' to refresh their times of last use, else 'look'; then keys.
-- Returns the length of each value, 0 if it is absent, as one text: to parse thousands of numbers
-- takes redis-py longer than Redis to find them.
-- A server that refuses to write can't note the use, which is no reason not to read.
local lengths = {}
local is_touch = ARGV[2] == 'touch'
for i = 3, #ARGV do
  local key = ARGV[i]
  local name = base..'kv:'..key
  lengths[i - 2] = redis.call('STRLEN', name)
  if is_touch and lengths[i - 2] > 0 and redis.call('ZSCORE', lru, key) then
    redis.pcall('ZADD', lru, now, key)
    redis.pcall('PEXPIRE', name, ttl)
  end
end
if is_touch then pcall(keep_books) end
return table.concat(lengths, ' ')
