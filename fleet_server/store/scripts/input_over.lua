#!lua flags=allow-oom
-- Forgets an input whose time is over, unless a job that has not ended names it. KEYS: input. ARGV: the time (Unix ms)
-- -> 1: its file may go, 0

local row = redis.call('HMGET', KEYS[1], 'e', 'n')
if row[1] and (row[2] or tonumber(row[1]) > tonumber(ARGV[3])) then
  return 0
end
redis.call('DEL', KEYS[1])
return 1
