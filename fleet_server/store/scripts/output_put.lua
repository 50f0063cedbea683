#!lua
-- KEYS: output. ARGV: filename, job, created_ms, size, record, key, making, home -> 1
-- include: outputs

put_output(ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10])
return 1
