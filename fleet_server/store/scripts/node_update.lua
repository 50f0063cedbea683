#!lua flags=allow-oom
-- One change of a node. KEYS: node. ARGV: id, what, session, value -> fields afterwards | false: unknown, other session or state
-- The value of a disconnect: '0' after a goodbye, '1' without, 'silent' without and unless the node's replica lives.
-- include: nodes
-- include: watch

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
  if value == 'silent' and lives(n.replica) then
    return false
  end
  if n.status == 'online' then
    save_node(id, n, {status = 'disconnected'}, true)
    went(id, value ~= '0')
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
