#!lua flags=no-writes
-- Failed jobs by their short fields. KEYS: dead. ARGV: max, member, limit, examine, type, cluster, model, reason ('': any)
-- -> {members with scores that match, the last one examined with its score | {}: that was all}
-- include: jobs
-- include: pages

local limit, examine = tonumber(ARGV[5]), tonumber(ARGV[6])
local function as_wanted(value, wanted)
  return wanted == '' or value == wanted
end

local rows = older(KEYS[1], ARGV[3], ARGV[4], '', examine)
local out = {}
for i = 1, #rows, 2 do
  local known = redis.call('HMGET', K.job .. rows[i], 'ki', 'mo', 'rs')
  local job_type, _, cluster = string.match(known[1] or '', KIND)
  if job_type and as_wanted(job_type, ARGV[7]) and as_wanted(cluster, ARGV[8])
    and as_wanted(known[2] or '', ARGV[9]) and as_wanted(known[3] or '', ARGV[10]) then
    out[#out + 1] = rows[i]
    out[#out + 1] = rows[i + 1]
    if #out == 2 * limit and i + 1 < #rows then
      return {out, {rows[i], rows[i + 1]}}
    end
  end
end
if #rows == 2 * examine then
  return {out, {rows[#rows - 1], rows[#rows]}}
end
return {out, {}}
