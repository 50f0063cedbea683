-- include: base

-- Since when this boot of a replica lives, until when it is taken to, and which boot it is; nothing of one unknown.
local function life_of(replica)
  local since, till, boot = string.match(redis.call('GET', K.life .. replica) or '', '^(%d+) (%d+) (.*)$')
  return tonumber(since), tonumber(till), boot
end

local function lives(replica)
  local _, till = life_of(replica or '')
  return till and till >= NOW
end

-- The life sign of a replica, given again when a third of it is over.
local function live(replica, boot, life)
  local since, till, last = life_of(replica)
  if last ~= boot or 3 * (till - NOW) <= 2 * life then
    local sign = int(last == boot and since or NOW) .. ' ' .. int(NOW + life) .. ' ' .. boot
    redis.call('SET', K.life .. replica, sign, 'PX', C.LIFE_KEPT_MS)
  end
end

-- Until when a node may take to dial again: the replica that its stream went through is gone, or began anew after that
-- stream. 0 where its replica is as it was.
local until_of = {}
local function back_until(node, grace)
  if not until_of[node] then
    until_of[node] = 0
    local row = redis.call('HMGET', K.node .. node, 'replica', 'connect_ms')
    local since, till = life_of(row[1] or '')
    if till and till < NOW then
      until_of[node] = till + grace
    elseif since and since > (tonumber(row[2]) or since) then
      until_of[node] = since + grace
    end
  end
  return until_of[node]
end

-- Leaves an attempt to its node for that long, once; whether it did. Whose lease is not renewed any more is not meant.
local function extend(id, j, grace, margin)
  if j.od or j.ex == j.tk then
    return false
  end
  local till = back_until(j.no, grace)
  if till <= NOW then
    return false
  end
  redis.call('HSET', K.job .. id, 'ex', j.tk)
  redis.call('ZADD', K.leases, 'XX', 'GT', int(till), id)
  redis.call('ZADD', K.deadlines, 'XX', 'GT', int(till - margin), id)
  return true
end

-- How many nodes vanished at once, if so many that nothing may be reassigned, else 0: more than `share` of at least
-- `least` known ones within the window. It ends when no more than that share is away, or after `freeze`; then that loss
-- is over, and never begins again.
local function mass_loss(share, least, window, freeze)
  local since = tonumber(redis.call('GET', K.frozen))
  if not since then
    redis.call('ZREMRANGEBYSCORE', K.lost, '-inf', '(' .. int(NOW - window))
  end
  local away = redis.call('ZCARD', K.lost)
  local known = away > 0 and away + redis.call('SCARD', K.online) or 0
  local many = away > 0 and known >= least and away > share * known
  if since and (not many or NOW - since >= freeze) then
    redis.call('DEL', K.frozen, K.lost)
    return 0
  end
  if many and not since then
    redis.call('SET', K.frozen, int(NOW))
  end
  return many and away or 0
end
