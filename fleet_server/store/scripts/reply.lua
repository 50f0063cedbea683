#!lua
-- The replies of calls that are no single step. KEYS: reply.
-- ARGV: 'begin', fingerprint, caller, claim ms -> {'ours', operation id} | {'kept', reply} | {'runs'} | {'reused'}
-- ARGV: 'keep', caller, reply | 'drop', caller | 'leave', caller -> 1 | 0: somebody else's by now
-- include: base

local key, what = KEYS[1], ARGV[3]
local known = redis.call('HMGET', key, 'f', 'by', 'until', 're')
if what == 'begin' then
  if not known[1] then
    -- The operation's id is its first caller's, whoever takes it over.
    redis.call('HSET', key, 'f', ARGV[4], 'op', ARGV[5])
    redis.call('PEXPIRE', key, C.IDEMPOTENCY_TTL_MS)
  elseif known[1] ~= ARGV[4] then
    return {'reused'}
  elseif known[4] then
    return {'kept', known[4]}
  elseif known[2] and known[2] ~= ARGV[5] and tonumber(known[3]) > NOW then
    return {'runs'}
  end
  redis.call('HSET', key, 'by', ARGV[5], 'until', int(NOW + ARGV[6]))
  return {'ours', redis.call('HGET', key, 'op')}
end
if known[2] ~= ARGV[4] then
  return 0
end
if what == 'keep' then
  redis.call('HSET', key, 're', ARGV[5])
  redis.call('PEXPIRE', key, C.IDEMPOTENCY_TTL_MS)
elseif what == 'drop' then
  redis.call('DEL', key)
else
  redis.call('HDEL', key, 'by', 'until')
end
return 1
