#!lua flags=allow-oom
-- What operators decide of a node. KEYS: node, held. ARGV: id, what, ... -> fields afterwards | false: unknown
-- cordon. uncordon: ends a drain too. drain: seconds, containers '1' | '0'. describe: clusters, labels (JSON, '' leaves
-- them). looked: the drain's start, jobs, containers, stopped '1' | '0', done '1' | '0'; the drain of another start stays
-- as it is.
-- include: nodes

local id, what = ARGV[3], ARGV[4]
local n = to_table(redis.call('HGETALL', KEYS[1]))
if not n.node_id then
  return false
end

local set = {}
if what == 'cordon' then
  set.cordoned = '1'
elseif what == 'uncordon' then
  set.cordoned = '0'
  if n.drain_start_ms then
    set.drain_start_ms = '0'
  end
elseif what == 'drain' then
  if (tonumber(n.drain_start_ms) or 0) == 0 then
    set.drain_start_ms = int(NOW)
  end
  set.cordoned = '1'
  set.drain_deadline_ms = int(NOW + 1000 * tonumber(ARGV[5]))
  set.drain_containers = ARGV[6]
  set.drain_stopped = '0'
  set.drain_done = '0'
  set.drain_jobs = int(redis.call('HLEN', KEYS[2]))
elseif what == 'describe' then
  if ARGV[5] ~= '' then
    set.clusters = ARGV[5]
  end
  if ARGV[6] ~= '' then
    set.labels = ARGV[6]
  end
elseif what == 'looked' and n.drain_start_ms == ARGV[5] and ARGV[5] ~= '0' then
  set.drain_jobs = ARGV[6]
  set.drain_left = ARGV[7]
  set.drain_stopped = ARGV[8]
  set.drain_done = ARGV[9]
end

local differs = false
for field, value in pairs(set) do
  differs = differs or (n[field] or '0') ~= value
end
if differs then
  save_node(id, n, set, true)
end
return flat_node(n)
