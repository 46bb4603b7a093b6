-- What every script of the tenant directory begins with. KEYS[1]: the hash of all records.
-- Its head is in fields that begin with '=', as no tenant's name does.
local function is_at(lineage, version, mark)
  local head = redis.call('HMGET', KEYS[1], '=lineage', '=version', '=mark')
  return (head[1] or '') == lineage and (head[2] or '0') == version and (head[3] or '') == mark
end
local function set_head(lineage, version, mark)
  redis.call('HSET', KEYS[1], '=lineage', lineage, '=version', version, '=mark', mark)
end
