#!lua
-- A node that is reached by SSH. KEYS: node. ARGV: id, ssh (JSON), info, heartbeat, replica -> fields | false: there is one
-- include: nodes

local id = ARGV[3]
if redis.call('EXISTS', KEYS[1]) == 1 then
  return false
end
local n = {}
save_node(id, n, {node_id = id, status = 'down', ssh = ARGV[4], info = ARGV[5], heartbeat = ARGV[6], replica = ARGV[7],
  created_ms = int(NOW)}, true)
redis.call('SADD', K.nodes, id)
return flat_node(n)
