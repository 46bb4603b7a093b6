-- Load a session, which counts as a use. ARGV[2]: name.
-- Returns {content, meta, created, used before, version, keys}, or nothing.
local fields = redis.call(
  'HMGET', record_of(ARGV[2]), 'content', 'meta', 'created', 'used', 'version')
if not fields[1] then return false end
redis.pcall('HSET', record_of(ARGV[2]), 'used', now)
fields[6] = all_keys(ARGV[2])
return fields
