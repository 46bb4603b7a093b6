-- List sessions. ARGV[2]: one name, or none for all.
-- Returns for each {name, meta, created, used, bytes of its content and of its values that are
-- there, number of values that are not}.
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
