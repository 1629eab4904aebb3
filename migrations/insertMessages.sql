-- Ten sample messages. Works with psql and with the sqlite3 shell.
INSERT INTO messages (recipient, content) VALUES
    ('+905551111101', 'Your parcel has left our warehouse.'),
    ('+905551111102', 'Your table for two is booked for 19:30.'),
    ('+905551111103', 'Your appointment is tomorrow at 10:00.'),
    ('+905551111104', 'Your password was changed just now.'),
    ('+905551111105', 'The invoice of this month is ready.'),
    ('+905551111106', 'Gate 12: boarding starts in ten minutes.'),
    ('+905551111107', 'Your order has been paid. Thank you!'),
    ('+905551111108', 'The lesson of Thursday moves to Friday.'),
    ('+905551111109', 'Your code is 4711. It is valid for five minutes.'),
    ('+905551111110', 'Welcome! Reply STOP to hear no more from us.');
