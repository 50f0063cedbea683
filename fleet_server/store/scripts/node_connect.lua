#!lua flags=allow-oom
-- A session of a node begins. KEYS: node. ARGV: id, session, instance id, info, replica, check '1' | '0', expected session
-- -> {'ok', row before: fields | false} | {'other', fields}
-- include: nodes

local id, session = ARGV[3], ARGV[4]
local before = redis.call('HGETALL', KEYS[1])
local n = to_table(before)
if n.session == session then
  local earlier = n.earlier and cjson.decode(n.earlier)
  if not earlier then
    return {'ok', false}
  end
  for field, value in pairs(earlier) do
    n[field] = value
  end
  return {'ok', flat_node(n)}
end
if ARGV[8] == '1' and (n.session or '') ~= ARGV[9] then
  return {'other', before}
end

local set = {node_id = id, session = session, instance_id = ARGV[5], info = ARGV[6], replica = ARGV[7], status = 'online',
  connect_ms = int(NOW), heartbeat_ms = int(NOW)}
if n.session then
  set.earlier = cjson.encode({session = n.session, instance_id = n.instance_id, replica = n.replica, status = n.status,
    connect_ms = n.connect_ms, heartbeat_ms = n.heartbeat_ms})
end
if not n.created_ms then
  set.created_ms = int(NOW)
end
save_node(id, n, set, true)
redis.call('SADD', K.nodes, id)
came(id)
return {'ok', #before > 0 and before or false}
