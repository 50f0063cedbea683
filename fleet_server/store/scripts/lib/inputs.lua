-- include: base

-- Inputs stay while jobs that have not ended name them: `n` of a row counts those, and a row with one forgets itself no
-- more. After the last end it stays a while longer, so that a job that failed can be retried.
local INPUT_AFTER_MS = 3600000

local function hold_inputs(j)
  for input in string.gmatch(j.iu, '%Z+') do
    local key = K.input .. input
    if redis.call('EXISTS', key) == 1 then
      redis.call('HINCRBY', key, 'n', 1)
      redis.call('PERSIST', key)
    end
  end
end

local function leave_inputs(j)
  for input in string.gmatch(j.iu, '%Z+') do
    local key = K.input .. input
    local row = redis.call('HMGET', key, 'n', 'e')
    local others = tonumber(row[1] or 0) - 1
    if others > 0 then
      redis.call('HINCRBY', key, 'n', -1)
    elseif others == 0 then
      local over = int(math.max(tonumber(row[2]), NOW + INPUT_AFTER_MS))
      redis.call('HDEL', key, 'n')
      redis.call('HSET', key, 'e', over)
      redis.call('PEXPIREAT', key, over)
    end
  end
end
