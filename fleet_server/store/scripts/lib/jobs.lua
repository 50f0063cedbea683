-- include: lanes

-- What hardly ever changes is two fields, joined by NUL (see records.py): fewer fields make hashes and
-- events half as dear, and two stay below 64 bytes, beyond which a server's defaults give up the compact form.
-- Further fields beyond records.FIELDS:
--   ra  1 once an attempt of this generation started: the queue TTL is over
--   tb  time from which the queue TTL counts, where that is not en
--   cn  1 while the loss of the present attempt would count
--   lx  nodes of the counted losses, with commas
--   pn, ps  node and start of the attempt that was lost, for a late Complete
--   ft  token of the attempt that failed last
--   od  why an exclusive job's lease is not renewed any more: T overdue, R given back by a server
--   ex  token of the attempt that was extended once, since its replica was gone
--   ld  definition of the lane, where the lane itself may be gone or is a mixed one
--   ro  operation id of the last retry
--   kl  of a group: children that have not ended
--   dp  1 if others wait for this job's end
--   iu  inputs that it names, joined by NUL

local KEEP_ATTEMPTS = 20
local KEEP_EVENTS = 100000
local KIND = '^(%Z*)%z(%Z*)%z(%Z*)%z(.*)$'
local LIMITS = '^(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)$'
local HIDDEN = {ld = true, ty = true, pr = true, cl = true, ln = true, mr = true, to = true, qt = true, cr = true, sc = true,
  cb = true, dp = true, tb = true, kl = true, ro = true, ft = true, lx = true, iu = true, ex = true}

local function load(id)
  local flat = redis.call('HGETALL', K.job .. id)
  if #flat == 0 then
    return nil
  end
  local j = to_table(flat)
  j.ty, j.pr, j.cl, j.ln = string.match(j.ki, KIND)
  j.mr, j.to, j.qt, j.cr, j.sc, j.cb = string.match(j.li, LIMITS)
  return j
end

local function kind_of(j)
  return table.concat({j.ty, j.pr, j.cl, j.ln}, '\0')
end

local function limits_of(j)
  return table.concat({j.mr, j.to, j.qt, j.cr, j.sc or '', j.cb or ''}, '\0')
end

local function flat_of(id, j)
  local flat = {'id', id}
  for field, value in pairs(j) do
    if not HIDDEN[field] then
      flat[#flat + 1] = field
      flat[#flat + 1] = value
    end
  end
  return flat
end

-- The same as one value, its parts joined: each value of a command or a reply costs the store about what such a join does.
-- nil where a part holds the separator itself.
local SEPARATOR = '\30'
local function joined_of(id, j)
  local flat = flat_of(id, j)
  if string.find(table.concat(flat), SEPARATOR, 1, true) then
    return nil
  end
  return table.concat(flat, SEPARATOR)
end

local function emit(kind, id, j)
  local joined = joined_of(id, j)
  if joined then
    redis.call('XADD', K.events, 'MAXLEN', '~', KEEP_EVENTS, '*', '_t', kind, '_ms', int(NOW), '_j', joined)
  else
    redis.call('XADD', K.events, 'MAXLEN', '~', KEEP_EVENTS, '*', '_t', kind, '_ms', int(NOW), unpack(flat_of(id, j)))
  end
end

-- Writes the changes of one step, and counts the version. `j` is afterwards what the hash holds.
local function save(id, j, set, del)
  set.ve = tonumber(j.ve) + 1
  set.up = NOW
  local args = {}
  for field, value in pairs(set) do
    j[field] = type(value) == 'number' and int(value) or value
    args[#args + 1] = field
    args[#args + 1] = j[field]
  end
  redis.call('HSET', K.job .. id, unpack(args))
  local gone = {}
  for _, field in ipairs(del) do
    if j[field] and not set[field] then
      j[field] = nil
      gone[#gone + 1] = field
    end
  end
  if #gone > 0 then
    redis.call('HDEL', K.job .. id, unpack(gone))
  end
end

local function remember(id, row)
  redis.call('RPUSH', K.attempts .. id, row)
  redis.call('LTRIM', K.attempts .. id, -KEEP_ATTEMPTS, -1)
end

-- An attempt that the store ended by itself, spelled for records.AttemptRow.
local function remember_own(id, j, err)
  remember(id, 'L' .. table.concat({j.ge, j.at, j.no or '', j.sa or '', int(NOW), err}, '\0'))
end

-- Where a job is listed by state: the children of groups apart.
local function listed(j, state)
  return (j.gj and K.child_state or K.state) .. state
end

-- Takes a live job out of every index that its state put it in; `gone`: it has left its line already.
local function leave(id, j, gone)
  unlist(listed(j, j.st), id)
  if j.st == 'queued' then
    count(K.priorities, j.pr, -1)
    if j.wr then
      unlist(K.scheduled, id)
    elseif gone then
      off_line(id, j)
    elseif not j.kn then
      dequeue(id, j)
    end
    unlist(K.ttl, id)
  elseif not j.kn then
    unlist(K.leases, id)
    unlist(K.deadlines, id)
    unset(K.held .. j.no, j.tk)
    count(K.lane_running, j.ln, -1)
  end
end

-- Puts a job whose hash says queued into the indexes; `due` is the time before which it is not in line.
local function arrive(id, j, due)
  list(listed(j, 'queued'), j.cr, id)
  count(K.priorities, j.pr, 1)
  if due then
    list(K.scheduled, due, id)
  elseif j.wr ~= 'DEPENDENCY' and not j.kn then
    enqueue(id, j)
  end
  if not j.ra and not j.kn then
    list(K.ttl, tonumber(j.tb or j.en) + tonumber(j.qt), id)
  end
end

-- A group runs from the first start of one of its children.
local function group_started(group)
  local g = load(group)
  if g and g.st == 'queued' then
    leave(group, g)
    save(group, g, {st = 'running', sa = NOW}, {'wr', 'wa'})
    list(listed(g, 'running'), g.cr, group)
    emit('job_update', group, g)
  end
end
