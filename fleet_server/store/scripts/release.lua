#!lua flags=allow-oom
-- Gives work back uncounted, to its old place. Where nobody knows that the node has stopped it, an exclusive job waits
-- for the end of its lease. KEYS: job, attempts. ARGV: id, token, attempt or '', whether it has stopped, the session that
-- its node must have or '' -> 1 | 0
-- include: attempts

local id, token = ARGV[3], ARGV[4]
local j = load(id)
if not j then
  return 0
end
if j.st == 'queued' and j.lt == token then
  return 1
end
if j.st ~= 'running' or j.tk ~= token then
  return 0
end
if ARGV[7] ~= '' and redis.call('HGET', K.node .. j.no, 'session') ~= ARGV[7] then
  return 0
end
if j.xc and ARGV[6] ~= '1' then
  redis.call('HSETNX', KEYS[1], 'od', 'R')
  return 1
end

if ARGV[5] ~= '' then
  remember(id, 'P' .. ARGV[5])
end
give_back(id, j, {}, {})
return 1
