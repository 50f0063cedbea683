#!lua flags=allow-oom
-- A node's agent began anew: what it ran in `session`, or in any but the node's present one, is lost.
-- An exclusive job waits for the end of its lease.
-- KEYS: held, node. ARGV: session, error, poison error, single, limit, avoid_ms -> {more, fields, ...}
-- include: attempts

local session, limit = ARGV[3], tonumber(ARGV[7])
local current = redis.call('HGET', KEYS[2], 'session')
local out = {0}
for token, id in pairs(to_table(redis.call('HGETALL', KEYS[1]))) do
  local j = load(id)
  if j and j.tk == token and not j.xc and (j.se == session or j.se ~= current) then
    if #out > limit then
      out[1] = 1
      break
    end
    lost(id, j, tonumber(ARGV[8]), ARGV[4], ARGV[5], ARGV[6] == '1')
    out[#out + 1] = flat_of(id, j)
  end
end
return out
