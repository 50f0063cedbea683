#!lua flags=allow-oom
-- KEYS: comfy_open, comfy_ended. ARGV: job, ended_ms or '', most -> 1: it was open | 0
-- include: base

local was = redis.call('ZREM', KEYS[1], ARGV[3])
if ARGV[4] ~= '' and was == 1 then
  redis.call('ZADD', KEYS[2], ARGV[4], ARGV[3])
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - tonumber(ARGV[5]))
end
return was
