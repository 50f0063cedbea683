#!lua
-- Which replica scales services. KEYS: autoscaler. ARGV: replica, ms that it may -> 1: this one | 0
-- include: base

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[3] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
