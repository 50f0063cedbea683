#!lua flags=allow-oom
-- KEYS: pauses, resumed. ARGV: 'pause' or 'resume', pause, most, operation id -> all pauses | false: too many, or unknown
-- include: base

local what, pause = ARGV[3], ARGV[4]
if what == 'pause' then
  if redis.call('HEXISTS', KEYS[1], pause) == 0 and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[5]) then
    return false
  end
  redis.call('HSETNX', KEYS[1], pause, int(NOW))
elseif redis.call('HDEL', KEYS[1], pause) == 1 then
  redis.call('SET', KEYS[2], ARGV[6], 'PX', 60000)
elseif redis.call('GET', KEYS[2]) ~= ARGV[6] then
  return false
end
return redis.call('HGETALL', KEYS[1])
