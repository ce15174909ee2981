"""What people read: the campaign report, its charts, its words and its checks."""
