#!lua flags=allow-oom
-- KEYS: output. ARGV: filename -> fields | false
-- include: base

local flat = redis.call('HGETALL', KEYS[1])
if #flat == 0 then
  return false
end
redis.call('DEL', KEYS[1])
redis.call('ZREM', K.outputs, ARGV[3])
redis.call('ZREM', K.job_outputs .. to_table(flat).j, ARGV[3])
return flat
