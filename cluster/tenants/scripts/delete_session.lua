-- Delete a session, its traces and every value that no other session needs.
-- ARGV[2..]: name, then more traces. Returns the keys removed, or nothing if there is no such
-- session.
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
