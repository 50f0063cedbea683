#!lua flags=allow-oom
-- One change of a node. KEYS: node. ARGV: id, what, session, value (of a disconnect '1': without a goodbye) -> fields afterwards | false: unknown, other session or state
-- include: nodes

local id, what, session, value = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local n = to_table(redis.call('HGETALL', KEYS[1]))
if not n.node_id or n.session ~= session then
  return false
end
if what == 'heartbeat' then
  local back = n.status ~= 'online'
  save_node(id, n, {heartbeat = value, heartbeat_ms = int(NOW), status = 'online'}, back)
  if back then
    came(id)
  end
elseif what == 'info' then
  if n.info ~= value then
    save_node(id, n, {info = value}, true)
  end
elseif what == 'disconnect' then
  if n.status == 'online' then
    save_node(id, n, {status = 'disconnected'}, true)
    went(id, value == '1')
  end
elseif what == 'down' then
  if n.status == 'online' then
    return false
  end
  if n.status ~= 'down' then
    save_node(id, n, {status = 'down'}, true)
  end
end
return flat_node(n)
