#!lua
-- The bucket has it from now on. KEYS: input. ARGV: its key there -> 1, 0 where it is over

if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], 'k', ARGV[3])
return 1
