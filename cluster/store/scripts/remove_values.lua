-- Remove values. ARGV[2..]: their keys. Sessions that need them go on needing them.
for i = 2, #ARGV do remove(ARGV[i]) end
keep_books()
