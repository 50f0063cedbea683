#!lua
-- A callback due again at once, with a new round of tries. KEYS: hooks, job, [idempotency]. ARGV: member, operation id,
-- fingerprint -> {'ok', {hash, due or false}} | {'reused'} | false: its job is gone
-- include: hooks
-- include: submitted

local member, operation = ARGV[3], ARGV[4]
local earlier = earlier_call(KEYS[3], ARGV[5], member)
if earlier and earlier[1] == 'reused' then
  return earlier
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  return false
end
local key = K.hook .. member
local known = redis.call('HMGET', key, '_k', '_o')
if earlier or known[2] == operation then
  return {'ok', hook_row(member)}
end

redis.call('HSET', key, '_s', 'pending', '_o', operation)
redis.call('HDEL', key, '_e')
if known[1] then
  -- Under way: should it fail, a new round begins.
  redis.call('HSET', key, '_r', 1)
else
  redis.call('HSET', key, '_t', 0)
  redis.call('ZADD', K.hooks, NOW, member)
end
remember_call(KEYS[3], ARGV[5], member)
return {'ok', hook_row(member)}
