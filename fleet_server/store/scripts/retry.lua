#!lua
-- A failed job queued again; of a group, its failed and cancelled children. KEYS: job, result, [idempotency].
-- ARGV: id, operation id, fingerprint -> {'ok', fields} | {'reused'} | {'state' | 'group', fields} | false: unknown
-- include: ends
-- include: submitted

local id, operation = ARGV[3], ARGV[4]
local j = load(id)
local earlier = earlier_call(KEYS[3], ARGV[5], id)
if earlier then
  if earlier[1] == 'reused' then
    return earlier
  end
  return j and {'ok', flat_of(id, j)} or false
end
if not j then
  return false
end
if j.ro == operation then
  return {'ok', flat_of(id, j)}
end
if j.st ~= 'failed' then
  return {'state', flat_of(id, j)}
end
local group = j.gj and load(j.gj)
if group and (group.st == 'cancelled' or group.st == 'succeeded') then
  return {'group', flat_of(j.gj, group)}
end

-- Queues an ended job in its next generation, `children` of them live if it is a group. It waits again for what it had
-- waited for in vain; where that failed or is gone, it is cancelled at once.
local function again(id, j, children)
  local parents, doomed = {}, false
  for _, parent in ipairs(redis.call('SMEMBERS', K.unmet .. id)) do
    local state = redis.call('HGET', K.job .. parent, 'st')
    if state == 'succeeded' then
      -- It failed first, which this job no longer waited for, and was retried.
      redis.call('SREM', K.unmet .. id, parent)
    else
      parents[#parents + 1] = parent
      doomed = doomed or state ~= 'queued' and state ~= 'running'
    end
  end
  if j.cb == '1' then
    keep_end(id, j, flat_of(id, j))
  end
  redis.call('ZREM', listed(j, j.st), id)
  redis.call('ZREM', K.ended, id)
  redis.call('ZREM', K.dead, id)
  redis.call('DEL', K.result .. id)
  local set = {st = 'queued', ge = tonumber(j.ge) + 1, en = NOW, ro = operation}
  local del = {'at', 'lo', 'lx', 'sa', 'ee', 'er', 'rs', 'lt', 'ft', 'pn', 'ps', 'ra', 'cn', 'no', 'se', 'pg', 'sp', 'ss',
    'lm', 'rm', 'um'}
  if j.kn then
    set.kl = children
  else
    local wanted = cjson.decode(j.ld).lane_id or j.ln
    j.ln = join_lane(wanted, j.ld, j.cl)
    if j.ln == wanted then
      del[#del + 1] = 'ld'
    end
  end
  j.sc = nil
  set.ki, set.li = kind_of(j), limits_of(j)
  if #parents > 0 then
    set.wr, set.wa = 'DEPENDENCY', #parents
    for _, parent in ipairs(doomed and {} or parents) do
      redis.call('ZADD', K.dependents .. parent, NOW, id)
      redis.call('HSET', K.job .. parent, 'dp', 1)
    end
  end
  save(id, j, set, del)
  if j.iu then
    hold_inputs(j)
  end
  arrive(id, j, nil)
  emit('job_update', id, j)
  return doomed
end

local revived = {}
if group and group.st == 'failed' then
  revived[1] = {j.gj, group, 1}
elseif group then
  redis.call('HINCRBY', K.job .. j.gj, 'kl', 1)
end
revived[#revived + 1] = {id, j}
if j.kn then
  for _, child in ipairs(redis.call('ZRANGE', K.children .. id, 0, -1)) do
    local c = load(child)
    if c and (c.st == 'failed' or c.st == 'cancelled') then
      revived[#revived + 1] = {child, c}
    end
  end
  revived[1][3] = #revived - 1
end
local doomed = {}
for _, one in ipairs(revived) do
  if again(one[1], one[2], one[3]) then
    doomed[#doomed + 1] = one[1]
  end
end
for _, one in ipairs(doomed) do
  settle('k', '', one)
end
remember_call(KEYS[3], ARGV[5], id)
return {'ok', flat_of(id, load(id))}
