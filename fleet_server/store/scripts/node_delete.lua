#!lua flags=allow-oom
-- Its certificate is worth nothing from here on. KEYS: node. ARGV: id -> {'ok' | 'online', fields} | false
-- include: nodes

local flat = redis.call('HGETALL', KEYS[1])
if #flat == 0 then
  return false
end
local n = to_table(flat)
if n.status == 'online' then
  return {'online', flat}
end
n.deleted = '1'
n.status = 'down'
announce(n)
redis.call('DEL', KEYS[1])
redis.call('SREM', K.nodes, ARGV[3])
redis.call('ZREM', K.lost, ARGV[3])
redis.call('HDEL', K.identities, ARGV[3])
return {'ok', flat}
