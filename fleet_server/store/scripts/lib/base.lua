local P = ARGV[2]

local NOW
if ARGV[1] == '' then
  local t = redis.call('TIME')
  NOW = t[1] * 1000 + math.floor(t[2] / 1000)
else
  NOW = tonumber(ARGV[1])
end

-- Lua prints large numbers with an exponent when it joins them to text.
local function int(x)
  return string.format('%.0f', x)
end

local function to_table(flat)
  local t = {}
  for i = 1, #flat, 2 do
    t[flat[i]] = flat[i + 1]
  end
  return t
end

-- When a lease is over for the store. An exclusive job's node has stopped it before the lease ends, by its own clock;
-- the margin is for how long that may take.
local EXCLUSIVE_MARGIN = 5000
local function lease_end(lease, exclusive)
  return NOW + tonumber(lease) + (exclusive and EXCLUSIVE_MARGIN or 0)
end
