-- Restore all records to a Redis that lost them or their last changes. ARGV: the head, then names
-- and records. Returns 1, or 0 with nothing changed if it has them, or another directory.
local head = redis.call('HMGET', KEYS[1], '=lineage', '=version')
local is_behind = head[1] == ARGV[1] and tonumber(head[2]) < tonumber(ARGV[2])
if head[1] and not is_behind then return 0 end
redis.call('DEL', KEYS[1])
set_head(ARGV[1], ARGV[2], ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
