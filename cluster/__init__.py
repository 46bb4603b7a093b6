"""Description, planning and shared services; imports no other package of ours."""
