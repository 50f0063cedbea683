-- include: base

local KEEP_EVENTS = 100000

local function flat_node(n)
  local flat = {}
  for field, value in pairs(n) do
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  return flat
end

local function announce(n)
  redis.call('XADD', K.events, 'MAXLEN', '~', KEEP_EVENTS, '*', '_t', 'node_update', '_ms', int(NOW), unpack(flat_node(n)))
end

-- A mass loss is judged by who is online, and by who vanished without a goodbye.
local function came(id)
  redis.call('SADD', K.online, id)
  redis.call('ZREM', K.lost, id)
end

local function went(id, lost)
  redis.call('SREM', K.online, id)
  if lost then
    redis.call('ZADD', K.lost, int(NOW), id)
  end
end

-- Writes a node's changes; with an event if what watchers see changed.
local function save_node(id, n, set, visible)
  if visible then
    set.version = int(tonumber(n.version or 0) + 1)
    set.updated_ms = int(NOW)
  end
  local args = {}
  for field, value in pairs(set) do
    n[field] = value
    args[#args + 1] = field
    args[#args + 1] = value
  end
  redis.call('HSET', K.node .. id, unpack(args))
  if visible then
    announce(n)
  end
end
