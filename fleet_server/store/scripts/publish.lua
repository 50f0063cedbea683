#!lua
-- KEYS: events. ARGV: type, field, value, ... -> id
-- include: base

return redis.call('XADD', KEYS[1], 'MAXLEN', '~', 100000, '*', '_t', ARGV[3], '_ms', int(NOW), unpack(ARGV, 4))
