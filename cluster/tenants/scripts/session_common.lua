-- What every script of sessions begins with, after cluster/store/scripts/common.lua.
local sessions = base..'sessions'
local function record_of(name) return base..'session:'..name end
local function keys_of(name) return base..'session-keys:'..name end
local function traces_of(name) return base..'session-traces:'..name end
local function all_keys(name) return redis.call('LRANGE', keys_of(name), 0, -1) end
local function charge_content(bytes)
  redis.call('HINCRBY', usage, 'bytes', bytes)
  redis.call('HINCRBY', usage, 'pinned', bytes)
end
