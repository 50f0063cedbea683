-- include: base

-- Owners share a cluster by virtual time: the jobs given to each, counted from the level at which the owner came. It is
-- kept while the owner has jobs in line anywhere in the cluster (`shares`), and for owners who left it ahead of the
-- others until those have caught up (`rested`), so that leaving and coming back gains nothing. Whoever is more than
-- CREDIT behind the one ahead of all counts as CREDIT behind: nobody saves up more, for instance while no node serves
-- their lane.
local CREDIT = 32

-- The lowest level that counts in a cluster: of the owners in line, or CREDIT behind the one ahead; nil: nobody waits.
local function floor_of(cluster)
  local first = redis.call('ZRANGE', K.shares .. cluster, 0, 0, 'WITHSCORES')
  if not first[2] then
    return nil
  end
  local last = redis.call('ZRANGE', K.shares .. cluster, -1, -1, 'WITHSCORES')
  return math.max(tonumber(first[2]), tonumber(last[2]) - CREDIT)
end

-- One more line of the owner in the cluster; the owner's virtual time.
local function enter_cluster(cluster, owner)
  if redis.call('HINCRBY', K.owner_lines .. cluster, owner, 1) > 1 then
    return redis.call('ZSCORE', K.shares .. cluster, owner)
  end
  local at = floor_of(cluster)
  if at then
    local rested = redis.call('ZSCORE', K.rested .. cluster, owner)
    if rested then
      at = math.max(at, tonumber(rested))
      redis.call('ZREM', K.rested .. cluster, owner)
    end
  end
  redis.call('ZADD', K.shares .. cluster, at or 0, owner)
  return at or 0
end

local function leave_cluster(cluster, owner)
  if redis.call('HINCRBY', K.owner_lines .. cluster, owner, -1) > 0 then
    return
  end
  redis.call('HDEL', K.owner_lines .. cluster, owner)
  local at = tonumber(redis.call('ZSCORE', K.shares .. cluster, owner))
  redis.call('ZREM', K.shares .. cluster, owner)
  local least = floor_of(cluster)
  if not least then
    redis.call('DEL', K.rested .. cluster)
  elseif at > least then
    redis.call('ZADD', K.rested .. cluster, at, owner)
    redis.call('ZREMRANGEBYSCORE', K.rested .. cluster, '-inf', least)
  end
end

-- So many jobs are given to the owner, who is in line; the virtual time afterwards.
local function charge(cluster, owner, jobs)
  local last = redis.call('ZRANGE', K.shares .. cluster, -1, -1, 'WITHSCORES')
  local at = tonumber(last[2])
  if last[1] ~= owner then
    at = math.max(tonumber(redis.call('ZSCORE', K.shares .. cluster, owner)), at - CREDIT)
  end
  redis.call('ZADD', K.shares .. cluster, at + jobs, owner)
  return at + jobs
end

-- Whose turn it is. A lane's turns may be older than the owners' virtual times, which only rise: the first one that is
-- up to date is next, the others are put right on the way. Each claim elsewhere makes an entry wrong at most once.
local function whose_turn(turns, cluster)
  for _ = 1, 64 do
    local two = redis.call('ZRANGE', turns, 0, 1, 'WITHSCORES')
    if not two[3] then
      return two[1]
    end
    local at = redis.call('ZSCORE', K.shares .. cluster, two[1])
    if tonumber(at) <= tonumber(two[2]) then
      return two[1]
    end
    redis.call('ZADD', turns, at, two[1])
  end
  return redis.call('ZRANGE', turns, 0, 0)[1]
end

-- As whose_turn, without putting right; of the first 8. Returns the owner and how far the cluster's least is behind.
local function likely_turn(turns, cluster)
  local owners = redis.call('ZRANGE', turns, 0, 7)
  local levels = redis.call('ZMSCORE', K.shares .. cluster, unpack(owners))
  local best
  for n = 1, #owners do
    if not best or tonumber(levels[n]) < tonumber(levels[best]) then
      best = n
    end
  end
  return owners[best], math.max(0, tonumber(levels[best]) - floor_of(cluster))
end
