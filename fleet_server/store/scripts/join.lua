#!lua flags=allow-oom
-- A machine becomes a node, once for each token; the same key again is the same answer. KEYS: join, node.
-- ARGV: node, fingerprint of its key, fresh identity -> {'ok', identity} | {'unknown'} | {'used'} | {'taken'}
-- include: nodes

local id, key, identity = ARGV[3], ARGV[4], ARGV[5]
local t = to_table(redis.call('HGETALL', KEYS[1]))
local known = redis.call('HGET', K.identities, id)
if not t.made then
  return {'unknown'}
end
if t.key then
  if t.key ~= key or t.node ~= id then
    return {'used'}
  elseif known ~= t.identity then
    return {'unknown'}
  end
  return {'ok', known}
end
local n = to_table(redis.call('HGETALL', KEYS[2]))
if known or n.status == 'online' then
  return {'taken'}
end
redis.call('HSET', KEYS[1], 'key', key, 'node', id, 'identity', identity)
redis.call('HSET', K.identities, id, identity)
if not n.node_id then
  save_node(id, n, {node_id = id, status = 'down', created_ms = int(NOW)}, true)
  redis.call('SADD', K.nodes, id)
end
return {'ok', identity}
