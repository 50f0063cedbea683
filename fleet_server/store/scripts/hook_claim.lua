#!lua flags=allow-oom
-- Callbacks that are due, for one sender until the claim ends. KEYS: hooks, claim of this sender. ARGV: token, limit,
-- lease_ms -> {ms until the next is due or false, {member, hash}...}; with the same token the same callbacks, while they are held
-- include: hooks

local token, limit, lease = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local out = {false}

local members = {}
local last = redis.call('LRANGE', KEYS[2], 0, -1)
if last[1] == token then
  for i = 2, #last do
    if redis.call('HGET', K.hook .. last[i], '_k') == token then
      members[#members + 1] = last[i]
    end
  end
else
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', K.hooks, '-inf', int(NOW), 'LIMIT', 0, limit)) do
    if redis.call('EXISTS', K.job .. job_of(member)) == 1 then
      redis.call('ZADD', K.hooks, NOW + lease, member)
      redis.call('HSET', K.hook .. member, '_k', token)
      members[#members + 1] = member
    else
      forget_hook(member)
    end
  end
  if #members > 0 then
    redis.call('DEL', KEYS[2])
    redis.call('RPUSH', KEYS[2], token, unpack(members))
    redis.call('PEXPIRE', KEYS[2], lease)
  end
end
for _, member in ipairs(members) do
  out[#out + 1] = {member, redis.call('HGETALL', K.hook .. member)}
end
local first = redis.call('ZRANGE', K.hooks, 0, 0, 'WITHSCORES')
if first[2] then
  out[1] = math.max(0, tonumber(first[2]) - NOW)
end
return out
