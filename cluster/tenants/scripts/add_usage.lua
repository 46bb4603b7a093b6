-- Add a batch of usage to a tenant's day; a batch that was sent twice counts once.
-- KEYS: the set of the day's tenants, this tenant's day. ARGV: the tenant, the writer, the number
-- of its batch, seconds to keep the day, then fields and by how much they grow.
local day, writer, batch = KEYS[2], 'writer:'..ARGV[2], tonumber(ARGV[3])
if tonumber(redis.call('HGET', day, writer) or 0) >= batch then return end
redis.call('HSET', day, writer, batch)
for i = 5, #ARGV, 2 do redis.call('HINCRBYFLOAT', day, ARGV[i], ARGV[i + 1]) end
redis.call('SADD', KEYS[1], ARGV[1])
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[4]) end
