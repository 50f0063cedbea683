-- include: ends

local POISON_LOSSES = 3
local POISON_LOSSES_ANYWHERE = 9

-- Puts a running job back: at once, to its old place in line, or not before `due`.
local function requeue(id, j, due, set, del)
  leave(id, j)
  set.st = 'queued'
  if due then
    set.wr = 'BACKOFF'
  end
  for _, field in ipairs({'tk', 'no', 'se', 'pg', 'sp', 'ss', 'sa', 'cn', 'od'}) do
    del[#del + 1] = field
  end
  save(id, j, set, del)
  arrive(id, j, due)
  emit('job_update', id, j)
end

-- The present attempt failed: again after a while, softly on another node, or for good. Returns the state that the job
-- is in now.
local function attempt_failed(id, j, retryable, backoff, avoid, err, reason)
  local failures = tonumber(j.at or 0) - tonumber(j.lo or 0)
  if retryable and failures <= tonumber(j.mr or 0) then
    local set = {ft = j.tk, av = j.no, au = NOW + avoid}
    requeue(id, j, backoff > 0 and NOW + backoff or nil, set, {'lt', 'pn', 'ps'})
    return 'queued'
  end
  finish(id, j, 'failed', {er = err, rs = reason, ft = j.tk}, {})
  return 'failed'
end

-- Gives the present attempt back uncounted.
local function give_back(id, j, set, del)
  set.at, set.lt, set.pn = tonumber(j.at) - 1, j.tk, j.no
  if j.sa then
    set.ps = j.sa
  end
  requeue(id, j, nil, set, del)
end

-- The node or its lease is lost. A loss counts once the engine had started; the third is poison if two nodes saw it
-- (one is enough where `single`), since then the job is the likelier cause. The ninth is, wherever: a node that is
-- always the first to be free again would else run it for ever.
local function lost(id, j, avoid, err, poison_err, single)
  local set = {av = j.no, au = NOW + avoid}
  if not j.cn then
    give_back(id, j, set, {'ft'})
    return 'queued'
  end
  remember_own(id, j, err)
  set.lo = tonumber(j.lo or 0) + 1
  local nodes = j.lx and ',' .. j.lx .. ',' or ','
  if not string.find(nodes, ',' .. j.no .. ',', 1, true) then
    set.lx = j.lx and j.lx .. ',' .. j.no or j.no
  end
  local several = string.find(set.lx or j.lx, ',', 1, true)
  if set.lo >= POISON_LOSSES and (several or single) or set.lo >= POISON_LOSSES_ANYWHERE then
    finish(id, j, 'failed', {er = poison_err, rs = 'POISON', lo = set.lo, lx = set.lx}, {})
    return 'failed'
  end
  set.lt, set.pn, set.ps = j.tk, j.no, j.sa
  requeue(id, j, nil, set, {'ft'})
  return 'queued'
end
