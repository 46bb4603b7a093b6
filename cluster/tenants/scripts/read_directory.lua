-- Read all records. ARGV: the head that the reader knows. Returns nothing if that is current.
if is_at(ARGV[1], ARGV[2], ARGV[3]) then return false end
return redis.call('HGETALL', KEYS[1])
