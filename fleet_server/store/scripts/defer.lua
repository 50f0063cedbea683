#!lua flags=allow-oom
-- Notes when a lane's head was first passed by. KEYS: events (for routing). ARGV: lane -> ms
-- include: base

if redis.call('HEXISTS', K.lane_waiting, ARGV[3]) == 0 then
  return int(NOW)
end
redis.call('HSETNX', K.lane_deferred, ARGV[3], int(NOW))
return redis.call('HGET', K.lane_deferred, ARGV[3])
