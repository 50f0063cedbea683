#!lua flags=allow-oom
-- Gives work back uncounted, to its old place. KEYS: job, attempts. ARGV: id, token, attempt or '' -> 1 | 0
-- include: jobs

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

if ARGV[5] ~= '' then
  remember(id, 'P' .. ARGV[5])
end
local set = {at = tonumber(j.at) - 1, lt = j.tk, pn = j.no}
if j.sa then
  set.ps = j.sa
end
requeue(id, j, nil, set, {})
return 1
