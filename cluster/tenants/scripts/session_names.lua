-- Returns the names of all sessions. KEYS[1]: the tenant's prefix.
return redis.call('SMEMBERS', KEYS[1]..'sessions')
