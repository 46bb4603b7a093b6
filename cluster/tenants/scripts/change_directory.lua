-- Change one record. ARGV: the head that the change was made to, the new head, the tenant's name,
-- its new record ('' to delete it). Returns 1, or 0 with nothing changed if Redis has another head.
-- HDEL comes first: on a full server a script may go on only once it has written something that
-- needs no memory, and a tenant must be disabled there too.
if not is_at(ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local name, new = ARGV[7], ARGV[8]
redis.call('HDEL', KEYS[1], name)
if new ~= '' then redis.call('HSET', KEYS[1], name, new) end
set_head(ARGV[4], ARGV[5], ARGV[6])
return 1
