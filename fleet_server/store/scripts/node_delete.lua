#!lua flags=allow-oom
-- KEYS: node. ARGV: id -> {'ok' | 'online', fields} | false
-- include: nodes

local flat = redis.call('HGETALL', KEYS[1])
if #flat == 0 then
  return false
end
if to_table(flat).status == 'online' then
  return {'online', flat}
end
redis.call('DEL', KEYS[1])
redis.call('SREM', K.nodes, ARGV[3])
return {'ok', flat}
