-- include: base

-- Up to `limit` members of a zset older than (max, member), newest first, down to `min` (exclusive), with scores.
local function older(key, max, member, min, limit)
  local out = {}
  local floor = min == '' and '-inf' or '(' .. min
  if member ~= '' and redis.call('ZSCORE', key, member) == max then
    local rank = redis.call('ZREVRANK', key, member)
    local rows = redis.call('ZRANGE', key, rank + 1, rank + limit, 'REV', 'WITHSCORES')
    for i = 1, #rows, 2 do
      if min ~= '' and tonumber(rows[i + 1]) <= tonumber(min) then
        break
      end
      out[#out + 1] = rows[i]
      out[#out + 1] = rows[i + 1]
    end
    return out
  end
  local ceiling = '+inf'
  if max ~= '' then
    ceiling = member == '' and '(' .. max or max
  end
  local offset = 0
  while #out < 2 * limit do
    local rows = redis.call('ZRANGE', key, ceiling, floor, 'BYSCORE', 'REV', 'LIMIT', offset, limit, 'WITHSCORES')
    for i = 1, #rows, 2 do
      local same = member ~= '' and rows[i + 1] == max and rows[i] >= member
      if not same and #out < 2 * limit then
        out[#out + 1] = rows[i]
        out[#out + 1] = rows[i + 1]
      end
    end
    if #rows < 2 * limit then
      break
    end
    offset = offset + limit
  end
  return out
end
